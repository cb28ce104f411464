"""HTTP → engine; nothing here knows how a run executes."""
