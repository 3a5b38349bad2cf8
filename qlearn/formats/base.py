"""What all formats have in common."""


class Format:
    """A grid of numbers, each with an unsigned code of `bits` bits. A subclass gives name, bits, encode and decode.

    It may bring a packing of its own as well; otherwise codes are packed as a stream of bits.
    """

    @property
    def count(self):
        """How many codes there are: they are 0 ... count - 1."""
        return 2**self.bits

    def pack(self, codes):
        """Return unsigned codes of any shape as bytes, uint8: see `integers.pack`."""
        from qlearn.formats import integers  # here, because that module builds on this one

        return integers.pack(codes, self.bits)

    def unpack(self, packed, count):
        """Return the first `count` unsigned codes of packed bytes, uint8: see `integers.unpack`."""
        from qlearn.formats import integers

        return integers.unpack(packed, self.bits, count)

    def packed_size(self, count):
        """Return how many bytes `count` packed codes take."""
        from qlearn.formats import integers

        return integers.packed_size(count, self.bits)

    def round(self, x):
        """Return the number of the grid that each number becomes, as float32: decode(encode(x))."""
        return self.decode(self.encode(x))

    def to_unsigned(self, codes):
        """Return codes as they are stored. They are unsigned already, but for signed integers, which override this."""
        return codes

    def from_unsigned(self, codes):
        """Return stored codes as they are shown: the inverse of `to_unsigned`."""
        return codes
