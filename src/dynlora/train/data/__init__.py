"""From files to rows that a model can learn: splits, columns, and their encodings."""
