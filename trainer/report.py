"""placeholder"""
def write(out):
    pass
