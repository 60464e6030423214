"""What ``ygglight demo`` runs: each system on a real model, beside what one would use without it."""
