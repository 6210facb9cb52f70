"""Make, apply and revert patches."""
