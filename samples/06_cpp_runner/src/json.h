// The library for JSON, in the one form that is used: keys keep their order, as Polygraphy's do.
#ifndef FPTQ_RUN_SRC_JSON_H
#define FPTQ_RUN_SRC_JSON_H

#include <nlohmann/json.hpp>

namespace fptq_run {

using Json = nlohmann::ordered_json;

}  // namespace fptq_run

#endif  // FPTQ_RUN_SRC_JSON_H
