"""Where threads, codec and store meet: write, commit, read, verify."""
