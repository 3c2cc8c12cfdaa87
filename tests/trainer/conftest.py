from tetrad.parallel import device

device.install()  # before any test module imports megatron.core
