"""The one place that holds kvjax's version."""

__version__ = "0.1.0"
