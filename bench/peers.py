PACKAGES: dict[str,str] = {}
def absent(): return {}
def providers(op): return {}
