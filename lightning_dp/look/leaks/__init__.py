"""Does anything let one example into another's gradient?"""
