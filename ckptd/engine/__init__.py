"""The state machine of jobs and snapshots, and the thread that runs it."""
