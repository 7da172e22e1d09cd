"""Metrics, prediction over a data set, and drawing. Imports no data set and no model."""
