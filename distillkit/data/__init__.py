"""Data sets, their transforms and samplers, and the check that names every broken input. Imports no model."""
