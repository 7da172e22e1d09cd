"""Pure functions on tensors: no modules, no state. Imports nothing else of distillkit."""
