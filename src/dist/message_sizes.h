// message_sizes.h: the pieces in which tensors travel as messages, and the memory that they are
// received in.
#pragma once
#include <algorithm>
#include <cstdint>

namespace safegrad::dist {

/// A reduce-scatter over messages moves pieces of at most so many bytes: small enough to be summed
/// while still in the cache, large enough that the cost per message does not count.
inline constexpr int64_t kPieceBytes = 256 * 1024;
/// Pieces a peer may be ahead.
inline constexpr int64_t kPiecesAhead = 4;

/// How a rank receives its shard of `numel` elements from each of `ranks` ranks.
struct ReceiveWindow {
  int64_t piece, pieces;  ///< elements of a piece; pieces of the shard
  int64_t ahead;          ///< pieces of each peer that there is room for
  int64_t numel;          ///< of the whole buffer, [ahead, ranks, piece]

  ReceiveWindow(int64_t ranks, int64_t numel, int64_t element_size)
      : piece(std::clamp<int64_t>(numel, 1, kPieceBytes / element_size)),
        pieces((numel + piece - 1) / piece),
        ahead(std::min(kPiecesAhead, pieces)),
        numel(ahead * ranks * piece) {}
};

}  // namespace safegrad::dist
