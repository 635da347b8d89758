"""Tests that need an accelerator; a package, since their files are named as those of tests/unit."""
