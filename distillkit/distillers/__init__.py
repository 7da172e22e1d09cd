"""Distillers: one file per method, named after it. They read views and never a model."""
