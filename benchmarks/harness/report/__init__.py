"""Report on studies: records in, one Markdown document with tables and figures out.

The report depends only on the records, with fixed order and seeds, so that the same records give
the same bytes.
"""
