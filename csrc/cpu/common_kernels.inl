// Fills `set` with the functions whose source every instruction set shares. Include inside a function.
set.convert_rows = convert_rows;
set.quantize_rows = quantize_rows;
set.level_rows = level_rows;
set.search_rows = search_rows;
set.row_statistics = row_statistics;
set.row_errors = row_errors;
set.encode_rows = encode_rows;
set.decode_rows = decode_rows;
set.compensate_rows = compensate_rows;
set.search8_rows = search8_rows;
set.row8_errors = row8_errors;
set.encode8_rows = encode8_rows;
set.decode8_rows = decode8_rows;
set.float_rows = float_rows;
set.linear8 = linear8;
set.uniform_rows = uniform_rows;
set.uniform_linear = uniform_linear;
