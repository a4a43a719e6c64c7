"""What two processes must agree on, bit for bit: keys, block format, records, errors, messages."""
