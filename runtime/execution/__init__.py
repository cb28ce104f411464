"""From a claimed run to its last line."""
