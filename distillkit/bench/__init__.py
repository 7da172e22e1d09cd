"""``distillkit bench``: what distillkit costs and how it behaves, measured against its peers on identical models."""
