"""The wrapper core: taps, views, teachers, distillers. Knows no task and no model family."""
