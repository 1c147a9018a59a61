"""What becomes of a trained network: `bip export`, `bip inspect`, `bip compare`."""
