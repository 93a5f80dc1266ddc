"""VaultGemma for zoo."""
