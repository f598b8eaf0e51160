"""Engines that are measured side by side, each in a process of its own.

The files here run under the peers' own interpreter too, where neither kvjax nor its dependencies need be installed.
"""
