"""What the commands show and ask: used by `kvjax.cli` only."""
