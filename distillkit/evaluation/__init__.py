"""Metrics, prediction over a data set, activation maps and pseudo masks, and drawing. Imports no data set."""
