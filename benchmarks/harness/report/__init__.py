"""The report on studies: records in, one Markdown document with tables and figures out.

Everything is computed from the records alone, in one order, with fixed seeds, so that the same
records give the same bytes.
"""
