"""Build: a lowered graph becomes an engine, and its layer list is compared with the policy."""
