"""What people see of a run. Observers change nothing in it."""
