"""Tables of the tensors that autograd keeps, per kind of layer and implementation."""
