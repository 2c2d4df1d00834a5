"""What refuses, and its words: each page is called once, at the edge, and the pages it guards then
trust.

A check raises UserError with what came, what was expected and what to do.
"""
