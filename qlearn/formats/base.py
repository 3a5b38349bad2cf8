"""What all formats have in common."""


class Format:
    """A grid of numbers, each with an unsigned code of `bits` bits. A subclass gives name, bits, encode and decode."""

    def round(self, x):
        """Return the number of the grid that each number becomes, as float32: decode(encode(x))."""
        return self.decode(self.encode(x))

    def to_unsigned(self, codes):
        """Return codes as they are stored. They are unsigned already, but for signed integers, which override this."""
        return codes

    def from_unsigned(self, codes):
        """Return stored codes as they are shown: the inverse of `to_unsigned`."""
        return codes
