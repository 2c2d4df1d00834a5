"""What makes one kind of device faster and changes no result.

Every page has one guard, `handles(...)`, and the page that uses it has the plain line beside it:
with every guard false the program gives the same ids (tests/test_fast.py).
"""
