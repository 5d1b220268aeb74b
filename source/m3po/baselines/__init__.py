"""What M3PO is compared with."""
