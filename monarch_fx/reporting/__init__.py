"""Tables and printouts made of the records."""
