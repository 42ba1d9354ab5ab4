// Latents of one call of a search, at most; they lie as [depth, kTile].
#pragma once

namespace fastldm {

constexpr int kTile = 96;

}  // namespace fastldm
