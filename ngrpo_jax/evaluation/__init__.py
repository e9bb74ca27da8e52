"""Evaluation on held-out problems: data sets, responses, stored generations, tables, comparisons."""
