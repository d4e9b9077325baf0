"""What every destination is: the protocol, its records, its addresses."""
