"""Using a trained model: loading, generating. Knows no trainer."""
