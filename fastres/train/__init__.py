"""The training program behind `fastres train`."""
