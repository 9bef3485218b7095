"""Text environments with one Gymnasium-style interface; import the module you need.

``base`` says what an environment is and checks one; ``household`` plays ALFWorld game files in pure
Python, ``games`` generates such games, ``alfworld`` plays them in the genuine engine, ``express``
plays TextWorldExpress; ``pool`` keeps slow environments in processes of their own.
"""
