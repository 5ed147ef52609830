"""Who may ask a server that other machines reach: tokens, and TLS."""
