"""Networks, loss and cost; torch only."""
