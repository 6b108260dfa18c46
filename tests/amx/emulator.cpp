// AMX in software: a SIGILL handler that decodes the tile instructions the processor refuses and does their work.
//
// The compiled kernels thus run as they are on machines without AMX, a few microseconds per tile instruction. Registers
// come from the signal's context, tiles are kept per thread. Whatever a real processor would refuse (tiles that are not
// configured or do not fit each other, a malformed configuration) is refused too: the reason goes to stderr and the
// process dies of SIGILL.
//
// Source of the encodings and checks: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2.
#include <csignal>
#include <cstdint>
#include <cstring>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>

namespace {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

struct State {
  bool configured;
  int row_bytes[kTiles];
  int rows[kTiles];
  uint8_t tile[kTiles][kRows][kRowBytes];
};

thread_local State state;
std::atomic<long> emulated{0};

// Registers by their number in an instruction.
constexpr int kRegister[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                               REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

[[noreturn]] void refuse(const char* reason) {
  constexpr char kPrefix[] = "AMX emulator: ";
  (void)!write(2, kPrefix, sizeof(kPrefix) - 1);
  (void)!write(2, reason, strlen(reason));
  (void)!write(2, "\n", 1);
  signal(SIGILL, SIG_DFL);
  raise(SIGILL);
  _exit(1);
}

// A three-byte VEX instruction of map 0F38 with its operands.
struct Instruction {
  int prefix;  // 0 none, 1 66, 2 F3, 3 F2
  int opcode;
  bool is_memory;
  int reg, rm, vvvv;  // rm: register number unless is_memory
  bool has_sib;
  uint64_t base;   // address without the index
  uint64_t index;  // index register times scale: the distance of a tile's rows
  int length;
};

bool decode(const uint8_t* at, const greg_t* registers, Instruction* out) {
  if (at[0] != 0xC4 || (at[1] & 0x1F) != 2) return false;  // VEX3, map 0F38
  if ((at[2] & 0x84) != 0) return false;                   // W0, 128 bits
  const int reg_high = at[1] & 0x80 ? 0 : 8, index_high = at[1] & 0x40 ? 0 : 8, base_high = at[1] & 0x20 ? 0 : 8;
  out->prefix = at[2] & 3;
  out->vvvv = (~at[2] >> 3) & 15;
  out->opcode = at[3];
  const int mod = at[4] >> 6, rm = at[4] & 7;
  out->reg = ((at[4] >> 3) & 7) | reg_high;
  out->is_memory = mod != 3;
  out->has_sib = false;
  out->base = out->index = 0;
  int length = 5;
  if (!out->is_memory) {
    out->rm = rm | base_high;
    out->length = length;
    return true;
  }
  bool from_next = false;
  int displacement_bytes = mod == 1 ? 1 : mod == 2 ? 4 : 0;
  if (rm == 4) {
    const int sib = at[length++];
    out->has_sib = true;
    const int index = ((sib >> 3) & 7) | index_high, base = sib & 7;
    if (index != 4) out->index = static_cast<uint64_t>(registers[kRegister[index]]) << (sib >> 6);
    if (base == 5 && mod == 0) {
      displacement_bytes = 4;
    } else {
      out->base = static_cast<uint64_t>(registers[kRegister[base | base_high]]);
    }
  } else if (rm == 5 && mod == 0) {
    displacement_bytes = 4;
    from_next = true;
  } else {
    out->base = static_cast<uint64_t>(registers[kRegister[rm | base_high]]);
  }
  int64_t displacement = 0;
  if (displacement_bytes == 1) {
    displacement = static_cast<int8_t>(at[length]);
  } else if (displacement_bytes == 4) {
    int32_t value;
    memcpy(&value, at + length, 4);
    displacement = value;
  }
  length += displacement_bytes;
  out->base += static_cast<uint64_t>(displacement);
  if (from_next) out->base += reinterpret_cast<uint64_t>(at) + static_cast<uint64_t>(length);
  out->length = length;
  return true;
}

void load_configuration(const uint8_t* from) {
  State fresh = {};
  if (from[0] == 0) {
    state = fresh;
    return;
  }
  if (from[0] != 1) refuse("ldtilecfg: palette is not 1");
  if (from[1] != 0) refuse("ldtilecfg: start_row other than 0 is not emulated");
  for (int i = 2; i < 16; ++i) {
    if (from[i] != 0) refuse("ldtilecfg: a reserved byte is not zero");
  }
  for (int tile = 0; tile < 16; ++tile) {
    uint16_t bytes;
    memcpy(&bytes, from + 16 + 2 * tile, 2);
    const int rows = from[48 + tile];
    if (tile >= kTiles) {
      if (bytes != 0 || rows != 0) refuse("ldtilecfg: a tile past the eighth is configured");
      continue;
    }
    if (bytes > kRowBytes || rows > kRows) refuse("ldtilecfg: a tile is larger than 16 x 64 bytes");
    if ((bytes == 0) != (rows == 0)) refuse("ldtilecfg: a tile has rows or bytes but not both");
    fresh.row_bytes[tile] = bytes;
    fresh.rows[tile] = rows;
  }
  fresh.configured = true;
  state = fresh;
}

void check_tile(int tile) {
  if (!state.configured) refuse("a tile is used before ldtilecfg");
  if (tile >= kTiles) refuse("a tile register past the eighth");
  if (state.rows[tile] == 0) refuse("a tile is used that is not configured");
}

void load_tile(int tile, const uint8_t* from, uint64_t stride) {
  check_tile(tile);
  memset(state.tile[tile], 0, sizeof(state.tile[tile]));
  for (int row = 0; row < state.rows[tile]; ++row) {
    memcpy(state.tile[tile][row], from + static_cast<uint64_t>(row) * stride, state.row_bytes[tile]);
  }
}

void store_tile(int tile, uint8_t* to, uint64_t stride) {
  check_tile(tile);
  for (int row = 0; row < state.rows[tile]; ++row) {
    memcpy(to + static_cast<uint64_t>(row) * stride, state.tile[tile][row], state.row_bytes[tile]);
  }
}

// sums [m][n] += a [m][4 k + j] * b [k][4 n + j], bytes to wrapping 32 bits.
void multiply(int sums, int a, int b, bool a_signed, bool b_signed) {
  check_tile(sums);
  check_tile(a);
  check_tile(b);
  if (sums == a || sums == b || a == b) refuse("tdp: a tile appears twice");
  if (state.row_bytes[sums] % 4 || state.row_bytes[a] % 4 || state.row_bytes[b] % 4) {
    refuse("tdp: a tile's rows are not whole 32-bit words");
  }
  if (state.rows[sums] != state.rows[a]) refuse("tdp: sums and first factor differ in rows");
  if (state.row_bytes[sums] != state.row_bytes[b]) refuse("tdp: sums and second factor differ in columns");
  if (state.row_bytes[a] / 4 != state.rows[b]) refuse("tdp: the factors do not fit each other");
  for (int m = 0; m < state.rows[sums]; ++m) {
    uint32_t row[kRowBytes / 4];
    memcpy(row, state.tile[sums][m], sizeof(row));
    for (int k = 0; k < state.rows[b]; ++k) {
      for (int n = 0; n < state.row_bytes[sums] / 4; ++n) {
        for (int j = 0; j < 4; ++j) {
          const uint8_t left = state.tile[a][m][4 * k + j], right = state.tile[b][k][4 * n + j];
          const int32_t x = a_signed ? static_cast<int8_t>(left) : left;
          const int32_t y = b_signed ? static_cast<int8_t>(right) : right;
          row[n] += static_cast<uint32_t>(x * y);
        }
      }
    }
    memset(state.tile[sums][m], 0, kRowBytes);
    memcpy(state.tile[sums][m], row, state.row_bytes[sums]);
  }
}

void handle(int, siginfo_t*, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const uint8_t* at = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);
  Instruction it;
  if (!decode(at, registers, &it)) refuse("not an AMX instruction");
  uint8_t* memory = reinterpret_cast<uint8_t*>(it.base);
  enum { kNone, k66, kF3, kF2 };
  if (it.opcode == 0x49 && it.is_memory && it.prefix == kNone && it.reg == 0) {
    load_configuration(memory + it.index);
  } else if (it.opcode == 0x49 && !it.is_memory && it.prefix == kNone && it.reg == 0 && it.rm == 0) {
    state = State{};  // tilerelease
  } else if (it.opcode == 0x49 && !it.is_memory && it.prefix == kF2 && it.rm == 0) {
    check_tile(it.reg);
    memset(state.tile[it.reg], 0, sizeof(state.tile[it.reg]));
  } else if (it.opcode == 0x4B && it.has_sib && (it.prefix == kF2 || it.prefix == k66)) {
    load_tile(it.reg, memory, it.index);  // tileloadd, tileloaddt1
  } else if (it.opcode == 0x4B && it.has_sib && it.prefix == kF3) {
    store_tile(it.reg, memory, it.index);
  } else if (it.opcode == 0x5E && !it.is_memory) {
    // uud, usd, sud, ssd: the first letter is the first factor, u = unsigned
    multiply(it.reg, it.rm, it.vvvv, it.prefix == kF3 || it.prefix == kF2, it.prefix == k66 || it.prefix == kF2);
  } else {
    refuse("an instruction that is not emulated");
  }
  ++emulated;
  registers[REG_RIP] += it.length;
}

}  // namespace

extern "C" {

// 0 if the handler is in place.
int amx_emulator_install() {
  struct sigaction action = {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  return sigaction(SIGILL, &action, nullptr);
}

// Instructions done in software so far, over all threads.
long amx_emulator_count() { return emulated; }

}  // extern "C"
