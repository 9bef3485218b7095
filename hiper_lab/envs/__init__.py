"""Text environments with one Gymnasium-style interface; import the module you need.

``base`` says what an environment is and checks one; ``pool`` keeps slow ones in processes.
``household`` plays ALFWorld game files in pure Python, ``games`` generates such games,
``alfworld`` plays them in the genuine engine, ``express`` plays TextWorldExpress.
``webshop`` is WebShop's text environment in a ``shop``, made of WebShop's files or a generated
``catalogue``; ``shopper`` is an expert for it.
``probes`` are tiny decision processes on which every number of the theory is exact.
"""
