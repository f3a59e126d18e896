"""Networks as chains of layers, each with its forward, VJP, JVP and the tangent of its VJP."""
