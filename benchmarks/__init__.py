"""Repeatable measurements: ratios between servers within one run, never absolute claims."""
