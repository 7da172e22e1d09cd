"""Geometry: box distributions, anchors, assigners, regions. Imports nothing else of distillkit."""
