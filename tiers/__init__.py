"""Where bytes rest: one file, one tier; base is the contract."""
