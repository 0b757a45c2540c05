"""Studies that train a model's last blocks only, on cached outputs of the others."""
