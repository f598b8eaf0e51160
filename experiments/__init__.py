"""Measurements that anyone can run again: `kvjax experiment NAME`, or `python -m experiments.run NAME`."""
